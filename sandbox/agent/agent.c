#include "agent.h"

#include "clock.h"

void agent_record_phase(struct agent *agent, const char *name) {
    if (agent->phase_count == PHASES_MAX)
        return;
    agent->phases[agent->phase_count].name = name;
    agent->phases[agent->phase_count++].at_ns = monotonic_ns();
}
