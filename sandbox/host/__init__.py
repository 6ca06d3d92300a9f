"""Linux helpers that know nothing of pods: processes, cgroups, mounts, descriptors, tasks.

Imports nothing of `sandbox` but its errors; `network` and `image` may use it too.
"""
