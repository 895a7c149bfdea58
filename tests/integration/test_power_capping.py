"""A router with a power budget and workers that report their watts: clocks are capped where the worker lets it."""

from kvmesh.rpc.server import serve
from kvmesh.rpc.worker_service import WorkerServicer
from kvmesh.types import Role, WorkerInfo, WorkerStatistics
from kvmesh.worker.clock import ClockCap
from tests.integration.router_fakes import RouterMesh, until


class FakeClocks:
    share = 1.0

    def cap(self, share):
        self.share = share


class MeteredWorker:
    """Serves what every worker does, and draws as many watts as the test says."""

    def __init__(self, name, watts, clocks):
        self.info = WorkerInfo(name, 1, Role.MIXED, "", 1)
        self.watts, self.clocks, self.cap = watts, clocks, ClockCap(clocks)

    def server(self):
        status = WorkerServicer(lambda: self.info, lambda _: self.statistics())
        return serve(host="127.0.0.1", port=0, services=[status.service, self.cap.service])

    def statistics(self):
        return WorkerStatistics(power_watts=self.watts, power_domain=self.info.worker_id)


async def test_above_the_budget_clocks_fall_where_they_may(caplog):
    caplog.set_level("INFO", "kvmesh_router.power")
    willing, unwilling = MeteredWorker("a", 600, FakeClocks()), MeteredWorker("b", 600, None)
    async with RouterMesh(power_budget=1000) as mesh, willing.server() as first, unwilling.server() as second:
        willing.info = WorkerInfo("a", 1, Role.MIXED, first.address, 1)
        unwilling.info = WorkerInfo("b", 1, Role.DECODE, second.address, 1)
        mesh.directory.set([*mesh.directory.workers(), willing.info, unwilling.info])
        await until(lambda: willing.clocks.share < 0.25)
        await until(lambda: "b keeps its clocks" in caplog.text)
        assert caplog.text.count("keeps its clocks") == 1
        await willing.cap.close()
        assert willing.clocks.share == 1.0
