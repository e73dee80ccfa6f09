// Build facts of a library, for Python.
#pragma once

namespace dbk {

struct Facts {
  const char *ops, *language, *kernel, *compiler;
};

Facts facts();

}  // namespace dbk
