"""Minimum safe versions of packages that parse untrusted files, and the vulnerabilities that they fix.

The versions that megaft needs to work are in pyproject.toml; its bounds are never below these.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True, slots=True)
class Floor:
    """A package, its oldest safe version, and the reason."""

    package: str
    version: str
    reason: str

    def rejects(self, version: str) -> bool:
        """Return True if `version` is older than the floor; pre-releases of the floor count as older."""
        return Version(version) < Version(self.version)


FLOORS = (
    Floor(
        "torch",
        "2.10",
        "CVE-2025-32434 and CVE-2026-24747: a checkpoint runs code despite torch.load(weights_only=True)",
    ),
    Floor(
        "transformers",
        "5.5",
        "CVE-2026-5241 and CVE-2026-4372: a model's config.json runs code without trust_remote_code; CVE-2026-1839: "
        "rng_state.pth does",
    ),
    Floor("sentencepiece", "0.2.1", "CVE-2026-1260: a crafted .model file corrupts memory"),
    Floor(
        "megatron-core",
        "0.15.3",
        "CVE-2026-24150 to -24152: unpickling of checkpoints and inputs, and command injection",
    ),
)
