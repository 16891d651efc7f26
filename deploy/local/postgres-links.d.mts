export function linkPostgres(node_modules: string): number;
