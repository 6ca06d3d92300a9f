"""Networks of pods: namespaces, CNI plug-ins, and the taps that connect VMs to them (entry: `attach`)."""
