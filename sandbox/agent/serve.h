// The agent's main loop: what happens on each turn, and the reaping of children.
#pragma once

struct agent;

// Opens the loop, signals and descriptors. The channel still has to be linked or to listen.
void serve_open(struct agent *agent);

// Serves until a PowerOff, or in standalone mode a SIGTERM. Sends what is queued, then kills all containers.
void serve_run(struct agent *agent);
