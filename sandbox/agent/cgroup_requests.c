#include "cgroup_requests.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "cgroup.h"
#include "clock.h"
#include "container.h"
#include "process_count.h"
#include "reply.h"
#include "scope.h"

// The cgroup of a container, or with "." the one that holds those of all containers. -1: there is none.
static int find_cgroup(struct agent *agent, const char *id) {
    struct container *container = container_find(agent, id);
    return !strcmp(id, ".") ? agent->cgroup : container ? container->cgroup : -1;
}

int cgroup_requests_write(struct agent *agent, const WriteCgroup *write, struct error *error) {
    int cgroup = find_cgroup(agent, write->container_id);
    if (cgroup < 0)
        return fail_about(error, ESRCH, "cgroup", "container is unknown");
    if (cgroup_write_files(cgroup, write->files, write->n_files, agent->lenient, error) < 0)
        return -1;
    if (write->oom_score)
        process_set_oom_scores(cgroup, write->oom_score->adj);
    return 0;
}

// Values one after another in one buffer, with the offset at which each ends: the buffer moves as it grows.
struct values {
    struct buffer bytes;
    size_t *ends;
    size_t count;
};

static void read_value(struct values *values, int directory, const char *name) {
    cgroup_read(directory, name, &values->bytes);
    values->ends[values->count++] = values->bytes.end;
}

static void read_values(struct agent *agent, const ReadCgroup *read, struct values *values) {
    autoclose int root = openat(agent->cgroup, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (size_t i = 0; i < read->n_container_ids; i++) {
        const char *id = read->container_ids[i];
        int directory = *id ? find_cgroup(agent, id) : root;
        for (size_t j = 0; j < read->n_names; j++)
            read_value(values, directory, strchr(read->names[j], '/') ? "" : read->names[j]);
    }
    for (size_t i = 0; i < read->n_paths; i++)
        read_value(values, AT_FDCWD, read->paths[i]);
}

static void count_all(struct agent *agent, const ReadCgroup *read, ProcessCount *counts) {
    bool files = read->count == HUSK__GUEST__V1__READ_CGROUP__COUNT__FILES;
    uint32_t files_left = FILES_COUNTED_MAX;
    for (size_t i = 0; i < read->n_container_ids; i++) {
        husk__guest__v1__process_count__init(&counts[i]);
        struct container *container = container_find(agent, read->container_ids[i]);
        if (container)
            process_count(container->cgroup, &counts[i], files, &files_left);
    }
}

void cgroup_requests_read(struct agent *agent, uint32_t request, const ReadCgroup *read) {
    size_t ids = read->n_container_ids, count = ids * read->n_names + read->n_paths, start = 0;
    struct values read_all = {.ends = memory_get(count * sizeof(size_t))};
    autofree ProtobufCBinaryData *values = memory_get(count * sizeof *values);
    autofree ProcessCount *counts = memory_get(ids * sizeof *counts);
    autofree ProcessCount **list = memory_get(ids * sizeof *list);
    read_values(agent, read, &read_all);
    for (size_t i = 0; i < count; start = read_all.ends[i++])
        values[i] =
            (ProtobufCBinaryData){.len = read_all.ends[i] - start, .data = read_all.bytes.data + start};
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
    buffer_free(&read_all.bytes);
    free(read_all.ends);
}
