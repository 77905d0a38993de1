// The whole runtime as one translation unit, which compiles in half the time.
#include "accesses.cpp"
#include "fiber.cpp"
#include "global_memory.cpp"
#include "host.cpp"
#include "scheduler.cpp"
#include "shared_memory.cpp"
#include "synchronization.cpp"
