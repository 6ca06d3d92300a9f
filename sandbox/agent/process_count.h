// Counts the processes of a container and their open files, and sets their OOM scores.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "protocol.h"

// Descriptors that one request counts at most, so that counting does not delay logs and exits.
enum { FILES_COUNTED_MAX = 8192 };

// Adds the processes of the cgroup and of those nested in it to `count`. With `files`, their descriptors are
// counted too, until `*files_left` is used up.
void process_count(int cgroup, ProcessCount *count, bool files, uint32_t *files_left);

// Sets oom_score_adj of every process of the cgroup and of those nested in it. A second pass catches what
// was forked during the first.
void process_set_oom_scores(int cgroup, int score);
