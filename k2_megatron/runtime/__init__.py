"""Where the machine is named: launch, process groups, seeds, stop signals, journal, and the CPU standing in for CUDA.

Only this folder asks a launcher's environment who this rank is, chooses the device and touches megatron-core's
`parallel_state`; everything downstream is handed groups and a device. (Elsewhere `torch.cuda` is asked for facts of
that device, and preprocessing sets variables for its workers.)
"""
