/* One cell's squared length after its triangular factor; see tvad_triangle.c. */
#ifndef TVAD_TRIANGLE_H
#define TVAD_TRIANGLE_H

#include "tvad.h"

/* Sum of r_i^2 of the cell at row-major `place` of all tasks' cells: t (values) int16, |t| <= 255; tables: A, then S, of its
 * task. Below 2^49. */
uint64_t tvad_triangle(const tvad_bank *bank, const uint32_t *tables, size_t place, const int16_t *t, void *scratch);
uint32_t tvad_triangle_scratch(uint32_t values);

#endif
