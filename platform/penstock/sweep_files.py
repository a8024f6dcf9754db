"""Where the files of a sweep lie in its storage, by its id. What its SAEs come to lies below `saes/`, by theirs."""


def attempt_file(sweep_id: str) -> str:
    """Which driver has the sweep (`fence.py`)."""
    return f"sweeps/{sweep_id}/attempt.json"


def status_file(sweep_id: str) -> str:
    """How the running sweep stands; its driver rewrites it every few seconds."""
    return f"sweeps/{sweep_id}/status.json"


def submitted_file(sweep_id: str) -> str:
    """That a job was submitted to go on with the sweep, and after which report."""
    return f"sweeps/{sweep_id}/submitted.json"


def control_file(sweep_id: str) -> str:
    """What the running sweep's driver is asked to do."""
    return f"sweeps/{sweep_id}/control.json"


def stop_file(sweep_id: str) -> str:
    """That the running sweep is to stop, and who has asked for it."""
    return f"sweeps/{sweep_id}/stop.json"


def spec_file(sweep_id: str) -> str:
    """The spec with every default written out."""
    return f"sweeps/{sweep_id}/spec.yaml"


def logs_folder(sweep_id: str) -> str:
    """What its drivers have said, a folder an attempt."""
    return f"sweeps/{sweep_id}/logs"


def accounts_folder(sweep_id: str) -> str:
    """What was held of the cluster, a file an attempt."""
    return f"sweeps/{sweep_id}/accounts"


def published_file(sweep_id: str) -> str:
    """Which token store the SAEs were trained on, and what protocol their figures are of."""
    return f"sweeps/{sweep_id}/published.json"


def result_file(sweep_id: str) -> str:
    """What a sweep came to that is finished."""
    return f"sweeps/{sweep_id}/result.json"
