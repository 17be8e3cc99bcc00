import { defineConfig } from 'vite';

export default defineConfig({
  // What @grafana/ui brings along asks for it.
  define: { 'process.env': '{}' },
  build: { chunkSizeWarningLimit: 10_000, minify: false, sourcemap: false, target: 'es2022' },
  esbuild: { jsx: 'automatic' },
});
