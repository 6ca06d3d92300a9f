// The processes of a container and what they hold: counted, or given another OOM score.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "protocol.h"

// Descriptors that one request may look at: counting must not hold up logs and exits for long.
enum { FILES_LOOKED_AT_MAX = 8192 };

// Fills `population`. With `files`, descriptors are counted too, as long as `*files_left` allows.
void population_count(int cgroup, ProcessCount *population, bool files, uint32_t *files_left);

// Gives every process the score; what is forked meanwhile is caught by a second look.
void population_set_oom_score(int cgroup, int score);
