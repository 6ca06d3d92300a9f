// From the kernel's hand-over to an open channel: only where the agent is PID 1 of a VM. Any failure powers
// the VM off.
#pragma once

struct agent;

void boot_mounts(void);
void boot_cgroups(struct agent *agent);

// Opens the channel that the kernel's command line names: husk.channel=serial:NAME or vsock:PORT.
void boot_channel(struct agent *agent);
