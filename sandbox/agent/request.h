// What the host says, frame by frame, and the answers.
#pragma once

#include "frame.h"

// Callbacks of the channel; `context` is the agent.
void request_resync(void *context, const uint8_t nonce[TOKEN_SIZE]);
int request_frame(void *context, const struct frame *frame);
