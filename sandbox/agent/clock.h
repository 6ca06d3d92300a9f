// The guest's clocks.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "protocol.h"

int64_t wall_ns(void);
uint64_t monotonic_ns(void);

// Sets CLOCK_REALTIME if it is off by more than the slack. A time of 0 or less is ignored.
void clock_set(int64_t wanted_ns, int64_t slack_ns);

// Changes the rate of all clocks, then steps CLOCK_REALTIME. With `check_only` the request is only validated.
int clock_adjust(const ClockAdjustment *adjustment, bool check_only, struct error *error);

void clock_read(Clocks *clocks);
