"""JumpReLU SAE, for inference: SAELens exports batch TopK and Matryoshka SAEs in this form too.

    pre = (x - b_dec) W_enc + b_enc          f = ReLU(pre) where pre > threshold, 0 elsewhere

Source: Rajamanoharan et al., "Jumping Ahead", arXiv 2407.14435, eq. 3.
"""

from torch import Tensor

from sae_core.functional import jumprelu
from sae_core.sae import SAE


class JumpReLUSAE(SAE):
    encoder_biases = ("b_enc", "threshold")
    b_enc: Tensor
    threshold: Tensor

    def _encode(self, x: Tensor) -> Tensor:
        return jumprelu(self.centre(x) @ self.W_enc + self.b_enc, self.threshold)
