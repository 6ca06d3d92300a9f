#include "hello.h"

#include <fcntl.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "clock.h"
#include "container.h"
#include "reply.h"
#include "scope.h"

#ifndef HUSK_BUILD_ID
#define HUSK_BUILD_ID "unknown"
#endif

enum { BOOT_ID_SIZE = 36, CLOCK_SLACK_NS = 50 * 1000000 }; // 50 ms

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
        if (!container->process.failed) // being undone: its start was never reported
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

int hello_frame(struct agent *agent, const struct frame *frame) {
    Hello *hello = husk__guest__v1__hello__unpack(NULL, frame->length, frame->payload);
    if (!hello)
        return FRAME_INVALID;
    uint32_t version = choose_version(hello);
    bool last = version && hello->snapshot; // what comes next is meant for a clone of this VM
    if (version && !agent->test)
        clock_set(hello->wall_ns, CLOCK_SLACK_NS);
    send_welcome(agent, version, hello->epoch);
    husk__guest__v1__hello__free_unpacked(hello, NULL);
    agent->channel.greeted = version && !last;
    return !version ? FRAME_INVALID : last ? FRAME_LAST : FRAME_HANDLED;
}
