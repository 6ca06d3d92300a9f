// Terminals. They come out of the container's own devpts, so that its programs find their names.
#pragma once

#include <stdint.h>

#include "protocol.h"

// A new terminal of the devpts at /dev/pts beneath `root`. Returns the master, `slave` the other side.
int pty_open(int root, const Process *process, int *slave, struct error *error);

int pty_resize(int master, uint32_t rows, uint32_t columns, struct error *error);
