// Dispatches what the host sends, frame by frame.
#pragma once

#include "frame.h"

// Callbacks of the channel; `context` is the agent.

// A new connection: answers the nonce, and ends what belonged to the connection before.
void request_resync(void *context, const uint8_t nonce[TOKEN_SIZE]);

// Returns FRAME_INVALID and so on.
int request_frame(void *context, const struct frame *frame);
