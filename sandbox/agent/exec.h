// Further processes in running containers, with their streams. They belong to the connection that asked
// for them: when it goes they are killed, and nobody is told of their end.
#pragma once

#include "container.h"
#include "process.h"
#include "stream.h"

struct exec {
    struct exec *next;
    struct agent *agent;
    char container_id[ID_MAX + 1];
    char id[ID_MAX + 1];
    struct exec_group cgroup;
    struct source population; // cgroup.events, once all of it was killed; -1: it was not
    struct process process;
    bool terminal;
    bool reply_on_exit;
    struct outlet outlets[2];
    struct inlet inlet;
};

void exec_start(struct agent *agent, uint32_t request, const Exec *message);
struct exec *exec_find(struct agent *agent, const char *container_id, const char *id);
int exec_signal(struct exec *exec, int signal, bool all, struct error *error);
int exec_resize(struct exec *exec, const Resize *size, struct error *error);
void exec_ended(struct exec *exec, int wait_status);

// True if the frame was for a stream of an exec. -1: it breaks the protocol.
int exec_frame(struct agent *agent, const struct frame *frame);

void exec_pump(struct exec *exec); // may free it
bool exec_has_work(const struct exec *exec);
void exec_disconnect(struct exec *exec);
