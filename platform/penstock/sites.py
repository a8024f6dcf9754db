"""Where an SAE sits: the hook point it reads and the one it reconstructs, and the arrays of the stream it is fed."""

from dataclasses import dataclass

ARROW = " -> "


@dataclass(frozen=True)
class Site:
    """An SAE reads and writes one hook point; a transcoder reads one and reconstructs (writes) another."""

    reads: str
    writes: str

    @property
    def is_transcoder(self) -> bool:
        return self.reads != self.writes

    @property
    def label(self) -> str:
        """What tables, commands and reports call the site: the hook point, or `READS -> WRITES`."""
        return f"{self.reads}{ARROW}{self.writes}" if self.is_transcoder else self.reads

    @property
    def hook_points(self) -> tuple[str, ...]:
        """What is harvested for the site."""
        return (self.reads, self.writes) if self.is_transcoder else (self.reads,)

    def array(self, hook_point: str, norm_over_median: float | None) -> str:
        """The name, in the stream, of the activations of one of the site's hook points.

        It is the hook point's own name, unless outliers are replaced at a transcoder site: there the same rows are
        replaced at both hook points, so that its arrays are other ones than those of an SAE that reads either.
        """
        if not self.is_transcoder or norm_over_median is None:
            return hook_point
        return f"{hook_point}@{self.reads}+{self.writes}"


def parse_array(name: str) -> tuple[str, tuple[str, ...]]:
    """(hook point, the hook points whose outliers are replaced) of an array of the stream; see `Site.array`."""
    hook_point, _, both = name.partition("@")
    return hook_point, tuple(both.split("+")) if both else (hook_point,)
