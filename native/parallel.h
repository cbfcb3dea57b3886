// A loop over tasks on a pool, from a lambda. Unnamed namespace: see simd.h.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

template <typename Body>
MSBP_INLINE void parallel(msbp::Pool& pool, int64_t tasks, const Body& body) {
  pool.run(
      tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<Body*>(&body));
}

template <typename T>
MSBP_INLINE T* scratch(msbp::Slot slot, int64_t count) {
  return static_cast<T*>(msbp::scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

MSBP_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MSBP_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
MSBP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
