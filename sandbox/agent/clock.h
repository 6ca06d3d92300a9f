// The guest's clocks: what they show, and making them go as the host's do.
#pragma once

#include <stdint.h>

#include "protocol.h"

struct agent;

enum { CLOCK_SLACK_NS = 50 * 1000000 };

int64_t wall_ns(void);
uint64_t monotonic_ns(void);

// Steps the wall clock when it is off by more than the slack.
void clock_set(const struct agent *agent, int64_t wall_ns, int64_t slack_ns);

int clock_adjust(const struct agent *agent, const ClockAdjustment *adjustment, struct error *error);
void clock_tell(Clocks *clocks);
