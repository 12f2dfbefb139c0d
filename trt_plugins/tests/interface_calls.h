// What interface_calls_own.cpp, compiled with our interface header, shows to
// interface_calls_test.cpp, compiled with TensorRT's.
#pragma once

#include <cstdint>
#include <vector>

struct Call {
    const char* function;
    std::vector<intptr_t> arguments;
};

extern Call last_call;

// Objects of classes derived from our declarations; the caller knows them by TensorRT's.
void* ownPlugin();
void* ownCore();
void* ownBuild();
void* ownRuntime();
void* ownCreator();

// Of classes that override nothing that they need not.
void* ownPlainBuild();
void* ownPlainRuntime();

// What the functions that return a pointer return.
extern const void* const kOwnPointer;
constexpr int32_t kOwnStatus = 1234567;

// Computes 3 + 4 * 5 and declares it as the size tensor of output 9, through our declaration of the
// builder and of expressions. True if all came out right.
bool usesForeignExpressions(void* builder);
