"""Meshes for tests: each is checked to be clean at the end."""

from collections.abc import AsyncIterator

import pytest

from tests.integration.calls import Calls
from tests.integration.mesh import Mesh


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    """One kvstore, one prefill, one decode."""
    async with Mesh() as mesh:
        yield mesh
        await mesh.assert_clean()


@pytest.fixture
def calls(mesh: Mesh) -> Calls:
    return Calls(mesh)
