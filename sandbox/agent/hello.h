// The first message of each connection: agrees on the protocol version, and reports the guest's state.
#pragma once

#include "agent.h"
#include "frame.h"

// Answers a Hello with a Welcome. Returns FRAME_HANDLED, FRAME_LAST before a snapshot, or FRAME_INVALID if it
// does not parse or there is no common version.
int hello_frame(struct agent *agent, const struct frame *frame);
