/* formats: the table of formats.h, for Python. */
#include "formats.h"

const nl_format *nl_format_at(int index) {
    static const nl_format table[] = {
#define ROW(NAME, CODE, ...) {#NAME, CODE, __VA_ARGS__},
        EACH_FORMAT(ROW)
#undef ROW
    };
    return index >= 0 && index < (int)(sizeof table / sizeof *table) ? &table[index] : NULL;
}
