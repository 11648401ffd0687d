/* pack: the rows of a block format, PACKED_ROWS of them side by side (formats.h has the picture). It is done
 * once, when a model is loaded, at the rate of the memory.
 *
 *     packed[group, block, unit, row] = stored[group, row, block, unit]       for the units of each block
 *
 * Compiled once as it stands: it moves bytes and computes nothing. */
#include "dispatch.h"
#include "formats.h"

/* The same unit of PACKED_ROWS rows. */
INLINE void pack_unit(uint8_t *to, const uint8_t *const rows[PACKED_ROWS], int64_t at, const size_t bytes) {
    for (size_t r = 0; r < PACKED_ROWS; r++) memcpy(to + r * bytes, rows[r] + at, bytes);
}

/* Up to PACKED_ROWS rows, which lie row_bytes apart. The last one is repeated where there is no other. */
INLINE void pack_group(const int format, uint8_t *to, const uint8_t *from, int64_t row_bytes, int64_t rows) {
    const uint8_t *row[PACKED_ROWS];
    for (int64_t r = 0; r < PACKED_ROWS; r++) row[r] = from + (r < rows ? r : rows - 1) * row_bytes;
    for (int64_t block = 0; block < row_bytes; block += format_of(format).bytes)
        for (int at = 0; at < format_of(format).bytes; at += unit_bytes(format, at)) {
            uint8_t *unit = to + PACKED_ROWS * (block + at);
            if (unit_bytes(format, at) == 2)
                pack_unit(unit, row, block + at, 2);
            else
                pack_unit(unit, row, block + at, 4);
        }
}

int nl_pack(void *dst, const void *src, int format, int64_t rows, int64_t IN, int threads) {
    if (!is_known(format) || !is_packed(format)) return NL_UNKNOWN_FORMAT;
    const int64_t row_bytes = IN / format_of(format).weights * format_of(format).bytes;
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r += PACKED_ROWS) switch (format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT:                                                                                             \
        pack_group(FORMAT, (uint8_t *)dst + r * row_bytes, (const uint8_t *)src + r * row_bytes, row_bytes,  \
                   rows - r);                                                                                \
        break;
            EACH_FORMAT(CASE)
#undef CASE
        }
    return 0;
}
