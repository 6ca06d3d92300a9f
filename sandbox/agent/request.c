#include "request.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "agent.h"
#include "attach.h"
#include "cgroup.h"
#include "clock.h"
#include "configure.h"
#include "dial.h"
#include "huge.h"
#include "population.h"
#include "scope.h"

#ifndef HUSK_BUILD_ID
#define HUSK_BUILD_ID "unknown"
#endif

enum { BOOT_ID_SIZE = 36 };

// -------------------------------------------------------------------------- conversation

void request_resync(void *context, const uint8_t nonce[TOKEN_SIZE]) {
    struct agent *agent = context;
    channel_reset(&agent->channel, nonce);
    for (struct exec *exec = agent->execs, *next; exec; exec = next) {
        next = exec->next;
        exec_disconnect(exec);
    }
    attach_disconnect(agent);
    dial_disconnect(agent);
    for (struct container *container = agent->containers; container; container = container->next)
        container_disconnect(container);
}

static ContainerState *describe(struct container *container) {
    ContainerState *state = memory_get(sizeof *state);
    husk__guest__v1__container_state__init(state);
    state->id = container->id;
    state->pid = (uint32_t)container->process.pid;
    state->log_start = container->log.start;
    state->log_end = container->log.end;
    if (container->process.state == PROCESS_ENDED) {
        state->state = HUSK__GUEST__V1__CONTAINER_STATE__STATE__EXITED;
        state->exited = memory_get(sizeof *state->exited);
        husk__guest__v1__exited__init(state->exited);
        container_describe(container, state->exited);
    }
    return state;
}

static void describe_containers(struct agent *agent, Welcome *welcome) {
    size_t count = 0;
    for (struct container *container = agent->containers; container; container = container->next)
        count++;
    welcome->containers = memory_get(count * sizeof(ContainerState *));
    for (struct container *container = agent->containers; container; container = container->next)
        if (!container->process.failed) // those are on their way out, and nobody was told of them
            welcome->containers[welcome->n_containers++] = describe(container);
}

static void read_boot_id(char id[BOOT_ID_SIZE + 1]) {
    autoclose int file = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (file >= 0 && read(file, id, BOOT_ID_SIZE) < 0)
        id[0] = '\0';
}

static void send_welcome(struct agent *agent, uint32_t version, uint64_t epoch) {
    Welcome welcome = HUSK__GUEST__V1__WELCOME__INIT;
    struct utsname kernel;
    char boot_id[BOOT_ID_SIZE + 1] = "";
    BootPhase phases[PHASES_MAX], *list[PHASES_MAX];
    if (agent->configured || agent->test)
        read_boot_id(boot_id);
    uname(&kernel);
    welcome.version = version;
    welcome.min_version = PROTOCOL_MIN;
    welcome.max_version = PROTOCOL_MAX;
    welcome.epoch = epoch;
    welcome.agent = HUSK_BUILD_ID;
    welcome.kernel = kernel.release;
    welcome.boot_id = boot_id;
    welcome.configured = agent->configured;
    for (int i = 0; i < agent->phase_count; i++) {
        husk__guest__v1__boot_phase__init(&phases[i]);
        phases[i].name = (char *)agent->phases[i].name;
        phases[i].at_ns = agent->phases[i].at_ns;
        list[i] = &phases[i];
    }
    welcome.phases = list;
    welcome.n_phases = (size_t)agent->phase_count;
    welcome.now_ns = monotonic_ns();
    describe_containers(agent, &welcome);
    send_message(agent, FRAME_WELCOME, 0, &welcome.base);
    for (size_t i = 0; i < welcome.n_containers; i++) {
        free(welcome.containers[i]->exited);
        free(welcome.containers[i]);
    }
    free(welcome.containers);
}

// The highest version that both sides speak; 0: there is none.
static uint32_t choose_version(const Hello *hello) {
    uint32_t version = hello->version < PROTOCOL_MAX ? hello->version : PROTOCOL_MAX;
    return version >= PROTOCOL_MIN && version >= hello->min_version ? version : 0;
}

// Without a common version everything up to the next token is skipped. So it is in a VM that is about to be
// snapshotted: what comes next is meant for a clone of it.
static int greet(struct agent *agent, const struct frame *frame) {
    Hello *hello = husk__guest__v1__hello__unpack(NULL, frame->length, frame->payload);
    if (!hello)
        return FRAME_SENSELESS;
    uint32_t version = choose_version(hello);
    bool last = version && hello->snapshot;
    if (version)
        clock_set(agent, hello->wall_ns, CLOCK_SLACK_NS);
    send_welcome(agent, version, hello->epoch);
    husk__guest__v1__hello__free_unpacked(hello, NULL);
    agent->channel.greeted = version && !last;
    return !version ? FRAME_SENSELESS : last ? FRAME_LAST : FRAME_TAKEN;
}

void send_message(struct agent *agent, enum frame_kind kind, uint32_t stream,
                  const ProtobufCMessage *message) {
    size_t size = protobuf_c_message_get_packed_size(message);
    protobuf_c_message_pack(message, channel_begin(&agent->channel, size));
    channel_commit(&agent->channel, kind, stream, size);
}

void send_event(struct agent *agent, Event *event) {
    if (agent->channel.greeted) // else the next Welcome tells
        send_message(agent, FRAME_EVENT, 0, &event->base);
}

void reply_send(struct agent *agent, uint32_t request, Reply *reply) {
    if (protobuf_c_message_get_packed_size(&reply->base) > FRAME_MAX) {
        struct error error = {0};
        fail_about(&error, EMSGSIZE, "reply", "more than fits a frame");
        reply_failure(agent, request, &error);
        return;
    }
    send_message(agent, FRAME_REPLY, request, &reply->base);
}

void reply_failure(struct agent *agent, uint32_t request, struct error *error) {
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Failure failure;
    failure_fill(&failure, error);
    reply.failure = &failure;
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

void reply_done(struct agent *agent, uint32_t request) {
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    reply_send(agent, request, &reply);
}

static void reply_result(struct agent *agent, uint32_t request, int result, struct error *error) {
    if (result < 0)
        reply_failure(agent, request, error);
    else
        reply_done(agent, request);
}

// -------------------------------------------------------------------------------- requests

static int signal_processes(struct agent *agent, const Signal *signal, struct error *error) {
    struct container *container = container_find(agent, signal->container_id);
    if (*signal->exec_id) {
        struct exec *exec = exec_find(agent, signal->container_id, signal->exec_id);
        return exec ? exec_signal(exec, (int)signal->signal, signal->all, error)
                    : fail_about(error, ESRCH, "signal", "exec is unknown");
    }
    return container ? container_signal(container, (int)signal->signal, signal->all, error)
                     : fail_about(error, ESRCH, "signal", "container is unknown");
}

// The cgroup of a container; with ".", the one that holds all of theirs. -1: there is none.
static int find_cgroup(struct agent *agent, const char *id) {
    struct container *container = container_find(agent, id);
    return !strcmp(id, ".") ? agent->cgroup : container ? container->cgroup : -1;
}

static int resize(struct agent *agent, const Resize *resize, struct error *error) {
    struct container *container = container_find(agent, resize->container_id);
    if (*resize->exec_id) {
        struct exec *exec = exec_find(agent, resize->container_id, resize->exec_id);
        return exec ? exec_resize(exec, resize, error)
                    : fail_about(error, ESRCH, "resize", "exec is unknown");
    }
    return container ? container_resize(container, resize, error)
                     : fail_about(error, ESRCH, "resize", "container is unknown");
}

static int write_cgroup(struct agent *agent, const WriteCgroup *write, struct error *error) {
    int cgroup = find_cgroup(agent, write->container_id);
    if (cgroup < 0)
        return fail_about(error, ESRCH, "cgroup", "container is unknown");
    if (cgroup_write_files(cgroup, write->files, write->n_files, agent->lenient, error) < 0)
        return -1;
    if (write->oom_score)
        population_set_oom_score(cgroup, write->oom_score->adj);
    return 0;
}

// One value: appended to `all`, its end noted.
struct gathered {
    struct buffer all;
    size_t *ends;
    size_t count;
};

static void gather(struct gathered *gathered, int directory, const char *name) {
    cgroup_read(directory, name, &gathered->all);
    gathered->ends[gathered->count++] = gathered->all.end;
}

static void gather_all(struct agent *agent, const ReadCgroup *read, struct gathered *gathered) {
    autoclose int root = openat(agent->cgroup, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (size_t i = 0; i < read->n_container_ids; i++) {
        const char *id = read->container_ids[i];
        int directory = *id ? find_cgroup(agent, id) : root;
        for (size_t j = 0; j < read->n_names; j++)
            gather(gathered, directory, strchr(read->names[j], '/') ? "" : read->names[j]);
    }
    for (size_t i = 0; i < read->n_paths; i++)
        gather(gathered, AT_FDCWD, read->paths[i]);
}

static void count_all(struct agent *agent, const ReadCgroup *read, ProcessCount *counts) {
    bool files = read->count == HUSK__GUEST__V1__READ_CGROUP__COUNT__FILES;
    uint32_t files_left = FILES_LOOKED_AT_MAX;
    for (size_t i = 0; i < read->n_container_ids; i++) {
        husk__guest__v1__process_count__init(&counts[i]);
        struct container *container = container_find(agent, read->container_ids[i]);
        if (container)
            population_count(container->cgroup, &counts[i], files, &files_left);
    }
}

static void read_cgroup(struct agent *agent, uint32_t request, const ReadCgroup *read) {
    size_t ids = read->n_container_ids, count = ids * read->n_names + read->n_paths, start = 0;
    struct gathered gathered = {.ends = memory_get(count * sizeof(size_t))};
    autofree ProtobufCBinaryData *values = memory_get(count * sizeof *values);
    autofree ProcessCount *counts = memory_get(ids * sizeof *counts);
    autofree ProcessCount **list = memory_get(ids * sizeof *list);
    gather_all(agent, read, &gathered);
    for (size_t i = 0; i < count; start = gathered.ends[i++])
        values[i] = (ProtobufCBinaryData){.len = gathered.ends[i] - start, .data = gathered.all.data + start};
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Husk__Guest__V1__CgroupValues body = HUSK__GUEST__V1__CGROUP_VALUES__INIT;
    body.n_values = count;
    body.values = values;
    body.wall_ns = wall_ns();
    if (read->count != HUSK__GUEST__V1__READ_CGROUP__COUNT__NOTHING) {
        count_all(agent, read, counts);
        for (size_t i = 0; i < ids; i++)
            list[i] = &counts[i];
        body.n_counts = ids;
        body.counts = list;
    }
    reply.body_case = HUSK__GUEST__V1__REPLY__BODY_VALUES;
    reply.values = &body;
    reply_send(agent, request, &reply);
    buffer_free(&gathered.all);
    free(gathered.ends);
}

static void open_log(struct agent *agent, uint32_t request, const OpenLog *open) {
    struct container *container = container_find(agent, open->container_id);
    struct error error = {0};
    if (!container || !open->stream) {
        fail_about(&error, container ? EINVAL : ESRCH, "log", container ? "stream" : "container is unknown");
        reply_failure(agent, request, &error);
        return;
    }
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Husk__Guest__V1__LogOpened opened = HUSK__GUEST__V1__LOG_OPENED__INIT;
    opened.offset = log_open(&container->log, open->offset, open->stream, open->window);
    reply.body_case = HUSK__GUEST__V1__REPLY__BODY_LOG_OPENED;
    reply.log_opened = &opened;
    reply_send(agent, request, &reply);
}

static void read_clocks(struct agent *agent, uint32_t request, const ReadClocks *tell) {
    struct error error = {0};
    if (tell->adjustment && clock_adjust(agent, tell->adjustment, &error) < 0) {
        reply_failure(agent, request, &error);
        return;
    }
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Clocks clocks = HUSK__GUEST__V1__CLOCKS__INIT;
    clock_tell(&clocks);
    reply.body_case = HUSK__GUEST__V1__REPLY__BODY_CLOCKS;
    reply.clocks = &clocks;
    reply_send(agent, request, &reply);
}

static void power_off(struct agent *agent, uint32_t request) {
    reply_done(agent, request);
    agent->stopping = true;
}

static int answer(struct agent *agent, uint32_t id, const Request *request) {
    struct error error = {0};
    switch (request->body_case) {
    case HUSK__GUEST__V1__REQUEST__BODY_CONFIGURE:
        reply_result(agent, id, configure_pod(agent, request->configure, &error), &error);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_PREPARE:
        reply_result(agent, id, prepare_vm(agent, request->prepare, &error), &error);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_ONLINE_CPUS:
        reply_result(agent, id, online_cpus(agent, request->online_cpus->count, &error), &error);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_HUGE_PAGES:
        reply_result(agent, id, huge_pages(agent, request->huge_pages, &error), &error);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_START:
        container_start(agent, id, request->start);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_EXEC:
        exec_start(agent, id, request->exec);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_SIGNAL:
        reply_result(agent, id, signal_processes(agent, request->signal, &error), &error);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_REMOVE:
        container_remove(agent, id, request->remove->container_id);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_WRITE_CGROUP:
        reply_result(agent, id, write_cgroup(agent, request->write_cgroup, &error), &error);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_READ_CGROUP:
        read_cgroup(agent, id, request->read_cgroup);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_OPEN_LOG:
        open_log(agent, id, request->open_log);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_RESIZE:
        reply_result(agent, id, resize(agent, request->resize, &error), &error);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_ATTACH:
        attach_start(agent, id, request->attach);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_DIAL:
        dial_start(agent, id, request->dial);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_READ_CLOCKS:
        read_clocks(agent, id, request->read_clocks);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_PING:
        reply_done(agent, id);
        return 0;
    case HUSK__GUEST__V1__REQUEST__BODY_POWER_OFF:
        power_off(agent, id);
        return 0;
    default:
        fail_about(&error, EOPNOTSUPP, "request", "unknown to this agent");
        reply_failure(agent, id, &error);
        return 0;
    }
}

static int take_request(struct agent *agent, const struct frame *frame) {
    Request *request = husk__guest__v1__request__unpack(NULL, frame->length, frame->payload);
    if (!request)
        return -1;
    answer(agent, frame->stream, request);
    husk__guest__v1__request__free_unpacked(request, NULL);
    return 0;
}

static int stream_frame(struct agent *agent, const struct frame *frame) {
    int taken = exec_frame(agent, frame);
    if (!taken)
        taken = attach_frame(agent, frame);
    return taken ? taken : dial_frame(agent, frame);
}

int request_frame(void *context, const struct frame *frame) {
    struct agent *agent = context;
    if (frame->kind == FRAME_HELLO)
        return agent->channel.greeted ? -1 : greet(agent, frame);
    if (!agent->channel.greeted || frame->stream == 0)
        return -1;
    if (frame->kind == FRAME_REQUEST)
        return take_request(agent, frame);
    struct container *container = container_of_log(agent, frame->stream);
    if (container && frame->kind == FRAME_WINDOW)
        log_acknowledge(&container->log, read_u32(frame->payload));
    else if (container && frame->kind == FRAME_RESET)
        container->log.stream = 0;
    else
        return stream_frame(agent, frame);
    return 0;
}
