// Interfaces, addresses and routes, over rtnetlink(7). What exists already is not an error, so a Configure
// that failed half-way can be sent again.
#pragma once

#include "protocol.h"

// Waits up to 5 s for each NIC to appear.
int net_configure(Interface **interfaces, size_t interface_count, Route **routes, size_t route_count,
                  struct error *error);

// Undoes what net_configure did to these interfaces.
int net_deconfigure(Interface **interfaces, size_t count, struct error *error);
