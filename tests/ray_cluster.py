"""A Ray cluster on 127.0.0.1 whose machines can be lost: a head without work, and nodes of one CPU each.

    python tests/ray_cluster.py CACHE…       a node for each folder, which is its user's cache

Prints the address when it is up. Reads lines: "lose N" kills node N at once, "end" ends all; it ends with its standard
input, too.
"""

from __future__ import annotations

import os
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
# A lost node is noticed within seconds and not within half a minute.
os.environ |= {"RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000"}

from ray.cluster_utils import Cluster

COMMON = {"node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **COMMON}
    )
    nodes = [
        cluster.add_node(num_cpus=1, env_vars={"XDG_CACHE_HOME": cache}, **COMMON) for cache in sys.argv[1:]
    ]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.startswith("lose"):
            cluster.remove_node(nodes[int(line.split()[1])], allow_graceful=False)
            print("lost", flush=True)
        elif line.startswith("end"):
            break
    cluster.shutdown()


if __name__ == "__main__":
    main()
