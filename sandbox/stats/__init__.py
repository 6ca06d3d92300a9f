"""Resource usage of pods and containers: collected from engines, parsed, and measured on the host."""
