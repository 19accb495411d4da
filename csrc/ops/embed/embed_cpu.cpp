// Computes: embed (embed.h).
// Layout: row-major rows; copies bytes, so both dtypes are exact.
// Work split: parts are runs of rows.
// Limits: none.
// Speed: see the op table in the README (bench/ops.py).
#include "embed.h"

#include "cpu/vec.h"
#include "host/index.h"

namespace ei::EI_ISA {

void embed(const EmbedArgs& a, Pool& pool) {
  const int64_t R = a.out.shape[0], D = a.out.shape[1], V = a.table.shape[0];
  const int64_t item = dtype_size(a.table.dtype);
  const int64_t rows_per_part = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, D));
  const ActiveSizes sizes{"embed", a.row_width, "row_width", a.sizes, "sizes", D, 16};
  pool.run((R + rows_per_part - 1) / rows_per_part, [&](int64_t part, int) {
    for (int64_t r = part * rows_per_part; r < std::min(R, (part + 1) * rows_per_part); ++r) {
      const int32_t id = embed_id(a, r);
      if (id < 0 || id >= V) {
        const std::string problem = embed_problem(a, r);
        if (!problem.empty()) pool.fail("embed: " + problem);
        continue;
      }
      const int64_t n = sizes.at(pool, r);
      if (n < 0) continue;
      std::memmove(a.out.ptr<char>() + r * a.out.stride[0] * item,
                   a.table.ptr<char>() + id * a.table.stride[0] * item, n * item);
    }
  });
}

}  // namespace ei::EI_ISA
