"""Pods in micro-VMs: engine, steps, pool, templates, growth. Only this package knows that a pod has a VM."""
