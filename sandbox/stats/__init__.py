"""Resource usage of pods and containers: kernel files are read, parsed and collected."""
