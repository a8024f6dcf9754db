"""Train an SAE with a script that SAELens' users have, its import line changed.

    python jobs/examples/5_train_like_saelens.py [TOKENS]

On the demo model, so that it runs anywhere: change `model_name`, `hook_name`, `d_in` and `dataset_path` for your own.
What a keyword means here, and which ones make no difference, is said when the runner is made; `python -m
penstock.compat` prints them all. The run is a sweep of one SAE on a local Ray (or on the cluster that RAY_ADDRESS
names): `penstock front`, `pull`, `report` and `ui` know it. The same script again trains nothing, and one that was
stopped goes on. `penstock.train(...)` is the same without SAELens' names.
"""

# %% The configuration
import sys

from penstock.compat import SAE, LanguageModelSAERunnerConfig, SAETrainingRunner

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
BATCH = 512
cfg = LanguageModelSAERunnerConfig(
    # the model, and where the SAE reads
    model_name="demo",
    hook_name="blocks.4.hook_resid_post",
    hook_layer=4,
    d_in=128,
    # the SAE
    architecture="standard",
    d_sae=128 * 8,
    activation_fn="relu",
    # how it is trained. The coefficient is one of SAELens' older units: here it is 0.0014 * 128**1.5, which is said
    lr=4e-3,
    lr_warm_up_steps=50,
    lr_decay_steps=TOKENS // BATCH // 5,
    l1_coefficient=1.4e-3,
    l1_warm_up_steps=TOKENS // BATCH // 4,
    use_ghost_grads=True,
    train_batch_size_tokens=BATCH,
    training_tokens=TOKENS,
    # on what
    dataset_path="demo",
    is_dataset_tokenized=False,
    context_size=128,
    store_batch_size_prompts=32,
    n_batches_in_buffer=16,
    # what is kept, and shown
    n_checkpoints=2,
    checkpoint_path="checkpoints",
    log_to_wandb=False,
    wandb_project="sae-training",
)

# %% Train
runner = SAETrainingRunner(cfg)
sae = runner.run()

# %% What it came to
print(f"L0 (active features a token): {runner.metrics['l0']:.1f}")
print(f"CE loss recovered: {runner.metrics['ce_loss_score']:.3f}")
print(f"explained variance: {runner.metrics['explained_variance']:.3f}, dead: {runner.metrics['dead_fraction']:.1%}")

# %% The SAEs on the way, and the last: folders that `penstock.compat.SAE` and `sae_lens.SAE` load as they are
for folder in runner.checkpoints:
    loaded = SAE.load_from_disk(folder)
    print(f"{folder}: {loaded.cfg.d_sae} features of {loaded.cfg.hook_name}")
