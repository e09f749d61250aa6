"""Minimum safe versions of packages that parse untrusted files, and the vulnerability that each fixes.

What megaft needs in order to work at all is in pyproject.toml, whose bounds are never below these.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True, slots=True)
class Floor:
    """A package, the oldest version of it that is safe, and why."""

    package: str
    version: str
    why: str

    def is_above(self, version: str) -> bool:
        """Return True if `version` is too old, as a pre-release of the floor is."""
        return Version(version) < Version(self.version)


FLOORS = (
    Floor(
        "torch",
        "2.10",
        "CVE-2025-32434 and CVE-2026-24747: a checkpoint runs code in spite of torch.load(weights_only=True)",
    ),
    Floor(
        "transformers",
        "5.5",
        "CVE-2026-5241 and CVE-2026-4372: a model's config.json runs code without trust_remote_code; CVE-2026-1839: "
        "rng_state.pth does",
    ),
    Floor("sentencepiece", "0.2.1", "CVE-2026-1260: a made-up .model file corrupts memory"),
    Floor(
        "megatron-core",
        "0.15.3",
        "CVE-2026-24150 to -24152: checkpoints and inputs are unpickled; and command injection",
    ),
)
