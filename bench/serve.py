"""Load on a mesh over gRPC: Poisson arrivals or a trace, latencies, throughput and goodput.

    python bench/serve.py --up --rate 2 --requests 50 --slo-ttft 1 --slo-tpot 0.1

The same as `kvmesh bench serve`; `--help` lists the options.
"""

import sys

from kvmesh.cli.main import execute

if __name__ == "__main__":
    sys.exit(execute(["bench", "serve", *sys.argv[1:]]))
