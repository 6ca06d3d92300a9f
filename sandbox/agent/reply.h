// What the agent sends to the host in messages: replies to requests, and events.
#pragma once

#include <sys/types.h>

#include "agent.h"
#include "protocol.h"

// Queues a message in one frame. It must fit FRAME_MAX.
void send_message(struct agent *agent, enum frame_kind kind, uint32_t stream,
                  const ProtobufCMessage *message);

// Queues an event. Dropped on a connection without a Welcome: the next Welcome shows the same state.
void send_event(struct agent *agent, Event *event);

// `request` is the id of the request. A reply larger than FRAME_MAX becomes a failure (EMSGSIZE).
void reply_send(struct agent *agent, uint32_t request, Reply *reply);
void reply_done(struct agent *agent, uint32_t request);
void reply_started(struct agent *agent, uint32_t request, pid_t pid);
void reply_failure(struct agent *agent, uint32_t request, struct error *error);

// Replies with the failure if `result` is negative, else with success.
void reply_result(struct agent *agent, uint32_t request, int result, struct error *error);
