// Interfaces, addresses and routes, over rtnetlink by hand. What is there already is not an error, so a
// Configure that failed half-way can be sent again.
#pragma once

#include "protocol.h"

int net_configure(Interface **interfaces, size_t interface_count, Route **routes, size_t route_count,
                  struct error *error);

// Undoes what net_configure did to these interfaces.
int net_take_back(Interface **interfaces, size_t count, struct error *error);
