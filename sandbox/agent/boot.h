// From the kernel's hand-over to an open channel: only when the agent is PID 1 of a VM.
#pragma once

struct agent;

void boot_mounts(void);
void boot_modules(void);
void boot_cgroups(struct agent *agent);

// Opens the channel that the kernel's command line names: serial:NAME or vsock:PORT.
void boot_channel(struct agent *agent);
