// What a library tells Python about itself.
#pragma once

namespace dbk {

struct Facts {
  const char *ops, *language, *kernel, *compiler;
};

Facts facts();

}  // namespace dbk
