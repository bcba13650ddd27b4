"""Speed, memory and compile time of training steps and kernels, each checked for right values before it is timed.

    python -m benchmarks.step       whole training steps: implementations x workloads, one process each
    python -m benchmarks.kernels    single kernels against their floors
    python -m benchmarks.planner    the planner's predictions against measured times

See README.md beside this file. Not part of the installed package.
"""
