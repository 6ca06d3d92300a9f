#include "reply.h"

#include <errno.h>

void send_message(struct agent *agent, enum frame_kind kind, uint32_t stream,
                  const ProtobufCMessage *message) {
    size_t size = protobuf_c_message_get_packed_size(message);
    protobuf_c_message_pack(message, channel_begin(&agent->channel, size));
    channel_commit(&agent->channel, kind, stream, size);
}

void send_event(struct agent *agent, Event *event) {
    if (agent->channel.greeted)
        send_message(agent, FRAME_EVENT, 0, &event->base);
}

void reply_send(struct agent *agent, uint32_t request, Reply *reply) {
    if (protobuf_c_message_get_packed_size(&reply->base) > FRAME_MAX) {
        struct error error = {0};
        fail_about(&error, EMSGSIZE, "reply", "larger than a frame");
        reply_failure(agent, request, &error);
        return;
    }
    send_message(agent, FRAME_REPLY, request, &reply->base);
}

void reply_done(struct agent *agent, uint32_t request) {
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    reply_send(agent, request, &reply);
}

void reply_started(struct agent *agent, uint32_t request, pid_t pid) {
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Husk__Guest__V1__Started started = HUSK__GUEST__V1__STARTED__INIT;
    started.pid = (uint32_t)pid;
    reply.body_case = HUSK__GUEST__V1__REPLY__BODY_STARTED;
    reply.started = &started;
    reply_send(agent, request, &reply);
}

void reply_failure(struct agent *agent, uint32_t request, struct error *error) {
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Failure failure;
    failure_fill(&failure, error);
    reply.failure = &failure;
    reply_send(agent, request, &reply);
}

void reply_result(struct agent *agent, uint32_t request, int result, struct error *error) {
    if (result < 0)
        reply_failure(agent, request, error);
    else
        reply_done(agent, request);
}
