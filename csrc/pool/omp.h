/* The functions of OpenMP that the kernels call, for a compiler without OpenMP's library: see pool.c. */
#pragma once

int omp_get_num_threads(void);
int omp_get_thread_num(void);
int omp_get_thread_limit(void);
