"""Linux helpers that know nothing of pods: system calls, processes, cgroups, mounts, files, tasks.

Imports nothing of `sandbox` but its errors, so `network` and `image` may use it too.
"""
