"""Measuring and limiting power on this machine: RAPL for processors, NVML for NVIDIA accelerators.

    meter  what a meter is, and watts from its joules
    rapl   the kernel's energy counters of processor packages
    nvml   energy counters and clocks of accelerators
    find   the meters that a setting asks for

Knows no worker, no policy and no plan. Reading energy may need a permission, setting clocks needs root: both refuse in
one sentence that says what to do.
"""
