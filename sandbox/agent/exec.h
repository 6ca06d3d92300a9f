// Additional processes in running containers, with their streams. They belong to the connection that started
// them: when it is lost they are killed, and their exits are not reported.
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
    struct source cgroup_events; // open once all of the exec was killed, until its last process has ended
    struct process process;
    bool counted; // in its container's `execs`
    bool terminal;
    bool reply_on_exit;
    struct output_stream outputs[2];
    struct input_stream input;
};

// Replies once the program runs or could not be run; with `reply_on_exit`, together with its exit.
void exec_start(struct agent *agent, uint32_t request, const Exec *message);

struct exec *exec_find(struct agent *agent, const char *container_id, const char *id); // NULL: none
int exec_signal(struct exec *exec, int signal, bool all, struct error *error);
int exec_resize(struct exec *exec, const Resize *size, struct error *error);

// To be called when its process has been reaped. May free the exec.
void exec_set_ended(struct exec *exec, int wait_status);

// Whether the frame was for a stream of an exec; FRAME_INVALID: it was, and breaks the protocol.
int exec_frame(struct agent *agent, const struct frame *frame);

void exec_pump(struct exec *exec); // may free it
bool exec_has_work(const struct exec *exec);
void exec_disconnect(struct exec *exec); // may free it
