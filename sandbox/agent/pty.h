// Terminals. They come from the container's devpts, so that its programs can find their names.
#pragma once

#include <stdint.h>

#include "protocol.h"

// Opens a new terminal of the devpts at /dev/pts beneath `root`. Returns the master; `slave` is the other
// end.
int pty_open(int root, const Process *process, int *slave, struct error *error);

int pty_resize(int master, uint32_t rows, uint32_t columns, struct error *error);
